"""From rows to exhibits: tables and figures out of the results store. Imports neither torch nor prefect nor mlflow."""
