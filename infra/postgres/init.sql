-- Runs once, when the volume is new: one database each for Prefect's records, MLflow's runs and our results.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
CREATE DATABASE sparseforge;
