"""Warm-up and decay of the learning rate."""

from moetrain.interop.swift.codecs import NUMBER, TEXT, WHOLE, Entry, Note, Reading, Writing


class Schedule(Entry):
    """Both count steps; ms-swift counts the decay from the first step, the recipe from the end of
    the warm-up (cosine, linear) or back from the last step (wsd). A fraction goes before a number
    of warm-up steps.
    """

    STYLES = ("constant", "cosine", "WSD", "linear")
    SHAPES = ("linear", "cosine", "exponential", "minus_sqrt")

    def read(self, reading: Reading) -> None:
        keys = reading.keys
        steps = keys.get("train.steps") or reading.steps
        until = reading.parse("lr_decay_iters", WHOLE)
        self._read_warmup(reading, until or steps)
        style = reading.parse("lr_decay_style", TEXT) or "cosine"
        if style not in self.STYLES:
            reading.lost("lr_decay_style", "the recipe has cosine, linear, wsd and constant")
        elif style == "constant":
            keys["optim.schedule"] = "constant"
        elif style == "WSD":
            self._read_wsd(reading, until, steps)
        else:
            keys["optim.schedule"] = style
            if until is not None:  # the warm-up is a number of steps then
                keys["optim.decay_steps"] = max(until - keys.get("optim.warmup", 0), 1)

    def _read_warmup(self, reading: Reading, total: int | None) -> None:
        warmup: float | None = reading.parse("lr_warmup_iters", WHOLE)
        fraction = reading.parse("lr_warmup_fraction", NUMBER)
        if fraction is not None and total is not None:
            warmup = round(fraction * total)
            why = f"optim.warmup={warmup} of {total} steps"
            reading.notes.append(Note("changed", f"--lr_warmup_fraction {fraction:g}", why))
        elif fraction is not None and 0 <= fraction < 1:
            warmup = fraction
        elif fraction is not None:
            reading.lost("lr_warmup_fraction", "optim.warmup is a share of less than 1, or steps")
        if warmup is not None:
            reading.keys["optim.warmup"] = warmup

    def _read_wsd(self, reading: Reading, until: int | None, steps: int | None) -> None:
        keys = reading.keys
        keys["optim.schedule"] = "wsd"
        shape = reading.parse("lr_wsd_decay_style", TEXT) or "exponential"
        if shape in self.SHAPES:
            keys["optim.wsd_decay"] = shape
        else:
            reading.lost("lr_wsd_decay_style", f"optim.wsd_decay knows {', '.join(self.SHAPES)}")
        decay = reading.parse("lr_wsd_decay_iters", WHOLE)
        if decay is not None:
            keys["optim.decay_steps"] = decay
        if until is not None and until != steps:
            reading.lost("lr_decay_iters", "wsd decays until the last step here")

    def write(self, writing: Writing) -> None:
        keys, flags = writing.keys, writing.flags
        names = ("schedule", "decay_steps", "warmup", "wsd_decay")
        writing.covered |= {f"optim.{name}" for name in names}
        schedule, decay, warmup, shape = (keys.get(f"optim.{name}") for name in names)
        steps = keys.get("train.steps")
        if warmup and warmup < 1:
            if steps is None:
                flags["lr_warmup_fraction"] = NUMBER.show(warmup)
            else:  # there the fraction is not rounded
                warmup = round(warmup * steps)
        if warmup and warmup >= 1:
            flags["lr_warmup_iters"] = WHOLE.show(int(warmup))
        flags["lr_decay_style"] = ("WSD" if schedule == "wsd" else schedule or "cosine",)
        if schedule == "wsd":
            flags["lr_wsd_decay_style"] = (shape or "linear",)
            if decay is None and steps is not None:  # as the engine has it
                decay = max(max(steps - int(warmup or 0), 1) // 10, 1)
            if decay is None:
                writing.lost("optim.schedule", "give --lr_wsd_decay_iters, a tenth of the steps")
            else:
                flags["lr_wsd_decay_iters"] = WHOLE.show(decay)
        elif schedule != "constant" and decay is not None:
            if warmup and warmup < 1:
                writing.lost("optim.decay_steps", "with a share of warm-up its end is not known")
            else:
                flags["lr_decay_iters"] = WHOLE.show(int(warmup or 0) + decay)
