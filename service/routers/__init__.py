"""HTTP routes: parse, call the database layer, shape. No SQL here."""
