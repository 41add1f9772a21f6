"""The winner as a model of MLflow's registry: a pyfunc that completes prompts by the numeric path of the sweep.

model = mlflow.pyfunc.load_model("models:/statespan-quickstart@champion")
model.predict(pandas.DataFrame({"prompt": ["Call me"], "max_new_tokens": [8]}))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd

from statespan.orchestration.served import ServedConfig, load_config

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

ALIAS = "champion"
CONFIG_TAG = "statespan.config"


class Champion(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Loads what best.json names when MLflow loads the model. Each prompt is run alone, as in a deterministic study."""

    def load_context(self, context: Any) -> None:
        from statespan.methods.base import ModelFacts
        from statespan.methods.table import build_method
        from statespan.models.checkpoint import load_model
        from statespan.models.runner import Runner

        config: ServedConfig = load_config(Path(context.artifacts["config"]))
        loaded = load_model(
            config.model.ref,
            dtype=config.numerics.dtype,
            device=config.numerics.device or "cpu",
            revision=config.model.revision,
        )
        if config.model.digest is not None and loaded.digest != config.model.digest:
            raise ValueError(
                f"{config.model.ref!r} holds other weights ({loaded.digest[:12]}) than the study's winner "
                f"({config.model.digest[:12]})"
            )
        self.tokenizer, self.runner = loaded.tokenizer, Runner(loaded.model)
        self.method = build_method(config.method.name, config.method.params, ModelFacts.of(loaded))

    # MLflow reads the hint of model_input, and takes a DataFrame for no schema: the signature is given with the model
    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """A DataFrame with `prompt` (text) and, if wanted, `max_new_tokens` (default 32) -> completions."""
        from statespan.models.generate import Decoding, generate

        texts = []
        limits = model_input.get("max_new_tokens", [32] * len(model_input))
        for prompt, limit in zip(model_input["prompt"], limits, strict=True):
            decoding = Decoding(max_new_tokens=int(limit), eos_id=self.tokenizer.eos_id)
            ids = self.tokenizer.encode(prompt)
            texts.append(generate(self.runner, self.method, [ids], [decoding], self.tokenizer).rows[0].text)
        return texts


def register(client: MlflowClient, run_id: str, config: Path, name: str) -> str:
    """Give the alias `champion` to the version of this configuration, made if there is none; returns the version."""
    import hashlib

    from mlflow.exceptions import MlflowException

    digest = hashlib.sha256(config.read_bytes()).hexdigest()[:32]
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    version = next((one.version for one in versions if one.tags.get(CONFIG_TAG) == digest), None)
    if version is None:
        source = _log(run_id, config)
        version = client.create_model_version(name, source, run_id, tags={CONFIG_TAG: digest}).version
    client.set_registered_model_alias(name, ALIAS, version)
    return str(version)


def _log(run_id: str, config: Path) -> str:
    """Log the pyfunc to a run; returns where it is."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    from statespan import __version__

    inputs = Schema([ColSpec("string", "prompt"), ColSpec("long", "max_new_tokens", required=False)])
    with mlflow.start_run(run_id=run_id):
        found = mlflow.pyfunc.log_model(
            name=ALIAS,
            python_model=Champion(),
            artifacts={"config": str(config)},
            pip_requirements=[f"statespan=={__version__}"],
            signature=ModelSignature(inputs=inputs, outputs=Schema([ColSpec("string")])),
        )
    return str(found.model_uri)
