"""What a site has, for the one who asked for something else."""

from contextlib import suppress

from slurm import client


def advice() -> str:
    """Say which partitions and accounts there are, as far as Slurm tells."""
    lines = []
    with suppress(client.SlurmError):
        told = client.run("sinfo", "--noheader", "--format=%R|%D|%c|%m|%G|%l")
        for line in sorted(set(told.splitlines())):
            name, nodes, cores, memory_mb, gres, limit = line.split("|")
            gpus = gres.split("(")[0] if gres != "(null)" else "no GPUs"
            lines.append(
                f"  partition {name}: {nodes} nodes with {cores} cores, "
                f"{memory_mb} MB, {gpus}; time limit {limit}"
            )
    with suppress(client.SlurmError):
        told = client.run(
            "sacctmgr",
            "--noheader",
            "--parsable2",
            "show",
            "user",
            "withassoc",
            "format=account,qos",
        )
        lines += [f"  account {account}" for account in sorted(set(told.split())) if account != "|"]
    return "\nThis site has:\n" + "\n".join(lines) if lines else ""
