"""What a run is told, and whether it can work: schema, recipes, rules, memory. Imports no torch by itself."""
