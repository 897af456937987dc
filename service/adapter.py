"""Which adapter a training trains where it starts from a run: that of the run, whose shape is settled."""

from erpo_core.errors import SpecError
from erpo_core.specs.common import LoraSpec
from erpo_core.specs.train import BaseTrainSpec, GrpoTrainSpec
from service.db.models import Run


def with_adapter_of(spec: BaseTrainSpec, parent: Run) -> BaseTrainSpec:
    """The specification as it will run: with the ``lora`` of the run that it starts from, if that has an adapter.

    Raises:
        SpecError: it asks for another one, or for every weight.
    """
    stored = parent.spec.get("lora", {})
    if stored is None:
        return spec  # the run's checkpoints are whole models
    lora = LoraSpec.model_validate(stored)
    if isinstance(spec, GrpoTrainSpec):
        lora = lora.model_copy(update={"lora_dropout": 0.0})  # scored without, whatever sft has trained it with
    if "lora" not in spec.model_fields_set:
        return spec.model_copy(update={"lora": lora})
    if spec.lora != lora:
        raise SpecError(
            f"what {parent.id} has trained is an adapter, and no other can be trained in its place",
            pointer="/lora",
            mend=f"leave `lora` out to train that one further, or write {lora.model_dump_json()}",
        )
    return spec
