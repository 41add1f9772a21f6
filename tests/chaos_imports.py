"""What a driver of the chaos suite imports, once for all of them (multiprocessing's fork server loads this)."""

import mlflow.pyfunc
import mlflow.tracking
import optuna.storages
import ray.tune
import ray.tune.schedulers
import ray.tune.search

import statespan.orchestration.champion
import statespan.orchestration.importance
import statespan.orchestration.report
import statespan.orchestration.sweep
import tests.chaos

__all__ = ["mlflow", "optuna", "ray", "statespan", "tests"]
