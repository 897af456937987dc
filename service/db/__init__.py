"""Models, queries and the state machine; the only part of ``service`` that workers may use beside the settings."""
