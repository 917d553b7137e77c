"""Run configuration and validation: schema, recipes, coercion, rules. Imports no torch by itself."""
