"""Running a site on its machine: folder, users, supervised programs, the way to the server."""
