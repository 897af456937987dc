"""How several processes train one model: accelerate's configurations, one for each strategy.

The same files serve `accelerate launch --config_file` in a user's own script and the service's child.
"""

from pathlib import Path

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")


def config_file(strategy: str) -> Path:
    """accelerate's configuration of a strategy; it wants ``--num_processes`` beside it.

    Raises:
        ValueError: no such strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: {strategy!r} is none of {', '.join(STRATEGIES)}")
    return Path(__file__).with_name(f"{strategy}.yaml")


def launcher(strategy: str, num_processes: int) -> list[str]:
    """Arguments of a Python interpreter that start what follows them (``-m module`` or a script) on so many processes
    of this machine."""
    settings = ["--config_file", str(config_file(strategy)), "--num_processes", str(num_processes)]
    return ["-m", "accelerate.commands.launch", *settings, "--main_process_port", "0"]
