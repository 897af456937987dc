"""Problems with verifiable answers: where they come from and what a usable row is."""
