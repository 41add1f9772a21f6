"""What drivers and MLflow servers of the chaos suite import, once for all of them (multiprocessing's fork server loads
this)."""

import warnings

import mlflow.pyfunc
import mlflow.tracking
import optuna.storages
import ray.tune
import ray.tune.schedulers
import ray.tune.search
import uvicorn

import statespan.orchestration.champion
import statespan.orchestration.importance
import statespan.orchestration.report
import statespan.orchestration.sweep
import tests.chaos

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Starlette's about what MLflow's server uses
    import mlflow.server.fastapi_app  # after uvicorn, by which it knows that it is to serve

__all__ = ["mlflow", "optuna", "ray", "statespan", "tests", "uvicorn"]
