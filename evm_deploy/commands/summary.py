"""Summary of a finished bundle, as evm-export prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evm_deploy._util.text import command

if TYPE_CHECKING:
    from evm_deploy.bundle.bundle import Bundle


def export_summary(bundle: Bundle, seconds: float) -> str:
    """Return the text that ends an export: size, parity, accuracy, location and the next command to run.

    seconds: wall time of the export.
    """
    from evm_deploy.calib.evaluate import Accuracy
    from evm_deploy.data.reading import MODES
    from evm_deploy.export.targets import get_target
    from evm_deploy.tasks import get_task

    m, parity = bundle.manifest, bundle.manifest.parity
    target, predicts = get_target(m.target), get_task(m.task).decode and m.preprocess().channels in MODES
    title = f"{m.model['name']} -> {target.runtime.label} {m.precision}, {m.sizes}"
    quantized = [m.details["quantization"]] if "quantization" in m.details else []
    lines = [
        ("Exported", f"{title:<58} {seconds:.0f} s   {bundle.size_bytes / 1e6:.1f} MB"),
        (
            "Parity",
            f"{m.plan['head']} max|d| {parity['max_abs']:.1e}  cosine {parity['cosine']:.6f}   {_worst(parity)}",
        ),
        *((("Accuracy", str(Accuracy.from_dict(m.accuracy))),) if m.accuracy else ()),
        *(
            (
                "Gain",
                f"{m.precision} is {q['speed_over_fp32_here']:.2f}x as fast as float32 here (1 thread), "
                f"{q['size_of_fp32']:.2f} of its size",
            )
            for q in quantized
            if "speed_over_fp32_here" in q
        ),
        *(("Smooth", f"{q['smooth']['value']}: {q['smooth']['reason']}") for q in quantized if "smooth" in q),
        *(("Weights", f"{b['value']} bits: {b['reason']}") for q in quantized if (b := q.get("weight_bits"))),
        *(("In float", block) for q in quantized for block in q["in_float"]),
        *((("Chosen", f"{chosen['value']}, {chosen['reason']}"),) if (chosen := m.plan.get("chosen")) else ()),
        *((("Scan", f"{m.scan['value']}: {m.scan['reason']}"),) if parity["scans"] else ()),
        *(("Note", note) for note in m.notes),
        *(
            ("Dropped", f"{len(keys)} keys: {', '.join(keys[:4])}")
            for keys in [m.model["checkpoint"]["dropped"]]
            if keys
        ),
        ("Saved", str(bundle.path)),
        *(target.engine.summary(m) if target.engine else ()),
        *(() if m.built else [("Next", f"on the device:  {command('evm-export', '--finish', bundle.path)}")]),
        (
            "Then" if not m.built else "Next",
            command("evm-run", bundle.path, "cat.jpg" if predicts else "--selftest"),
        ),
    ]
    if predicts:
        lines.append(("", command("evm-run", bundle.path, "--selftest")))
    return "\n".join(f"{key:<9} {text}" for key, text in lines)


def _worst(parity: dict[str, Any]) -> str:
    """Return the largest relative error of a scan and the name of that scan."""
    scans = parity["scans"]
    if not scans:
        return "no scans"
    worst = max(scans, key=lambda scan: max(scan["ssm"], scan["probe"]))
    return f"worst scan {max(worst['ssm'], worst['probe']):.0e} ({worst['name']})"
