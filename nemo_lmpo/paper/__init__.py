"""The paper's comparisons and tables, and what is measured beside them; no other room imports this one."""
