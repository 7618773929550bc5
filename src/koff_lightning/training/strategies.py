"""How several processes share a run: each holds the whole model, or its part of the frozen weights (FSDP2).

What is trained is small. Either way it is whole and fp32 on every rank, and its gradients are averaged once per
optimizer step. So both give the same run, and a checkpoint of one goes on under the other or on a single device.

Lightning's own strategies do not fit. Torch's DDP wrapper stops at parameters that a step does not use, as those of
absent domains, or (told to look for them) falls out of step where the rows of one rank use none at all. FSDP1 cannot
mix trained and frozen weights in a layer. FSDP2 alone does not reduce the gradients of what it leaves whole, and under
Lightning gathers the backbone for each checkpoint.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from koff_lightning.backbone import decoder_layers
from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError


class _Averaging(Strategy):
    """Averages gradients after the last backward of an optimizer step, before anything looks at them."""

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: LightningModule | None = None, **kwargs: Any
    ) -> Any:
        def averaged() -> Any:
            loss = closure()
            ranks.average_gradients([p for group in optimizer.param_groups for p in group["params"]])
            return loss

        return super().optimizer_step(optimizer, averaged, model, **kwargs)


class ReplicatedStrategy(_Averaging, DDPStrategy):
    """Data parallelism with the whole model on every device."""

    def configure_ddp(self) -> None:
        """No wrapper: see the head of this file."""


class ShardedStrategy(_Averaging, ModelParallelStrategy):
    """Data parallelism with the frozen weights of each decoder layer split over all devices of all nodes (FSDP2).

    Embeddings and final norm are whole everywhere: the loss reads the output embedding directly.

    Args:
        process_group_backend: Backend of torch.distributed, such as nccl or gloo; by default that of the device.
        timeout: How long a rank waits for another.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Shard over all devices. Lightning's default is a data-parallel size of one per node, which shards nothing."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Split the backbone, which the module has built by now; one device keeps it whole."""
        backbone = self.lightning_module.model.backbone
        if self.world_size > 1 and not isinstance(backbone.base_model, FSDPModule):
            shard_frozen(backbone, self.device_mesh["data_parallel"])
        super().setup(trainer)
        # FSDP2 keeps the buffers of its first forward, and none may be written in training that is made for inference.
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is whole on this rank, and so all that is trained; the shards are never gathered."""
        state = self.lightning_module.state_dict()
        return {name: value for name, value in state.items() if not isinstance(value, DTensor)}

    # What is trained and its optimizer are as on a single device, and so is how they are saved and restored.
    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True
    optimizer_state = Strategy.optimizer_state
    load_checkpoint = Strategy.load_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict


def shard_frozen(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Split the frozen weights of every decoder layer over `mesh`; what is trained, and the rest, stays whole.

    Weights are then shards between forwards: what reads them (counts, fingerprint) must have done so before.
    """
    # The backward gathers a layer's weights where a gradient passes it, so on every rank one must pass all layers, also
    # where no row trains anything: else a rank waits for another's part for ever.
    model.enable_input_require_grads()
    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(model.base_model, mesh=mesh, ignored_params=set(model.parameters()))  # the root; splits nothing itself


def check(trainer: Trainer | None) -> None:
    """Refuse strategies that stop in mid-run or under which every rank would train a model of its own.

    Raises:
        KoffError: The trainer has neither a single device nor a strategy of this file.
    """
    if trainer is None or isinstance(trainer.strategy, (SingleDeviceStrategy, _Averaging)):
        return
    sharded = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
    own = ShardedStrategy.__name__ if sharded else ReplicatedStrategy.__name__
    raise KoffError(
        f"{type(trainer.strategy).__name__} cannot train a decomposition: use "
        f"--config hardware/{'fsdp' if sharded else 'ddp'}.yaml (in Python strategy={own}() of "
        "koff_lightning.training.strategies), or one device (--trainer.devices 1)"
    )
