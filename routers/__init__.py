"""Prompt routers, which choose among plans at run time. Imported as `genprune.routers`; none in this release."""
