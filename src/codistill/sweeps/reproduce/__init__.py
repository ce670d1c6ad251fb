"""The tables of MFEF's paper as commands: protocols and cells, the ledger of finished runs, and what they show."""
