from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
CLUSTERS = [ROOT / "ray_cluster.yaml", ROOT / "examples" / "ray_cluster_onprem.yaml"]


def load(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_rays_own_schema_accepts_the_cluster(path):
    validate_config(prepare_config(load(path)))


@pytest.mark.parametrize(
    "change", [{"idle_minutes": 5}, {"available_node_types": {"head": {"resources": {"GPU": 0.5}, "node_config": {}}}}]
)
def test_the_schema_would_notice_a_mistake(change):
    with pytest.raises(Exception, match=r"idle_minutes|0\.5"):
        validate_config(prepare_config(load(CLUSTERS[0]) | change))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_every_node_wants_the_token_and_the_dashboard_listens_on_loopback(path):
    cluster = load(path)
    assert any(str(target).endswith("auth_token") for target in cluster["file_mounts"])
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in cluster[key][-1] and "RAY_USAGE_STATS_ENABLED=0" in cluster[key][-1]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


def test_the_head_has_no_gpu_and_gpu_workers_scale_from_nothing():
    types = load(CLUSTERS[0])["available_node_types"]
    assert "GPU" not in types["head"]["resources"]
    for name in ("gpu_spot", "gpu_on_demand"):
        assert types[name]["resources"]["GPU"] == 1 and types[name]["min_workers"] == 0
    assert types["gpu_spot"]["priority"] > types["gpu_on_demand"]["priority"]


def test_the_kubernetes_manifest_asks_for_a_token_and_one_image_of_one_version():
    _, cluster = yaml.safe_load_all((ROOT / "examples" / "kuberay.yaml").read_text())
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert len(images) == 1 and not images.pop().endswith(":latest")
    locked = dict(
        line.split(" ")[0].split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line
    )
    assert spec["rayVersion"] == locked["ray"]
