"""What private runs cost a site: forecast, budgets, ledger, and paying before anything leaves."""
