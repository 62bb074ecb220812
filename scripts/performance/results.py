"""What was measured, what it should be, and how it is printed, kept and compared."""
import json, statistics

#: Goals for speed relative to the bare directory: row, at least.
RATIO_GOALS = {
    "random write 4k, 1 file": 1.0, "random write 4k, 4 files": 1.0, "sequential write 1M + fsync": 0.90, "8k write + fsync each": 0.90,
    "sequential read 1M, cold": 0.95, "sequential read 1M, warm": 0.95, "random read 4k, 1 file": 1.0, "random read 4k, 4 files": 1.0,
    "stat, first": 0.40, "find -ls": 0.60, "open + read 4k + close": 0.40, "tar": 0.60, "rename": 0.60, "create + write 4k + close": 0.60,
    "unlink": 0.60, "pgbench": 0.90,
}


#: Rows whose every operation is a request to the filesystem, which then does to the backing directory what the bare row does.
ASKED = {
    "sequential read 1M, cold", "sequential write 1M + fsync", "random write 4k, 1 file", "random write 4k, 4 files", "8k write + fsync each",
    "append of 100 bytes", "stat, first", "open + read 4k + close", "find -ls", "tar", "cp -a", "create + write 4k + close", "rename", "unlink",
}
#: Rows in which no filesystem is asked: the kernel answers from what it has in its cache, of all FUSE filesystems alike.
ANSWERED_BY_THE_KERNEL = {"sequential read 1M, warm", "random read 4k, 1 file", "random read 4k, 4 files", "stat, again"}
#: The FUSE filesystems that cowfs is to leave behind.
PEERS = ("bindfs", "mergerfs", "fuse-overlayfs")
#: A computed column: an operation takes what it takes on the floor, and what it takes on the bare directory.
BOTH = "floor + bare"


def short(value):
    """A figure with three significant digits."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return "{:,.{}f}".format(value, digits)


def _verdict(missed, judged):
    if not judged:
        return ""
    return "none" if not missed else "all" if missed == judged and len(judged) > 1 else ", ".join(missed)


class Results:
    def __init__(self, machine, options):
        self.machine, self.options = machine, options
        #: (group, row) -> {"unit", "samples": side -> [a number for each round; more is faster]}
        self.speeds = {}
        #: [{"group", "row", "side", "value", "unit", "limit", "samples"}]; less is better
        self.figures = []
        self.problems = []

    def speed(self, group, row, side, value, unit):
        entry = self.speeds.setdefault((group, row), {"unit": unit, "samples": {}})
        entry["samples"].setdefault(side, []).append(value)

    def figure(self, group, row, side, value, unit, limit=None, samples=None):
        self.figures.append({"group": group, "row": row, "side": side, "value": value, "unit": unit, "limit": limit, "samples": samples})

    def ratios(self, group, row):
        """For each side the median over the rounds of its speed by that of the bare directory in the same round."""
        samples = self.speeds[group, row]["samples"]
        bare, found = samples.get("bare", []), {}
        for side, values in samples.items():
            pairs = [value / base for value, base in zip(values, bare) if value and base]
            if pairs:
                found[side] = statistics.median(pairs)
        if "floor" in found and row in ASKED:
            found[BOTH] = 1 / (1 + 1 / found["floor"])
        return found

    def save(self, path):
        speeds = [{"group": group, "row": row, "unit": entry["unit"], "samples": entry["samples"], "goal": RATIO_GOALS.get(row),
                   "ratios": self.ratios(group, row)} for (group, row), entry in self.speeds.items()]
        with open(path, "w") as f:
            json.dump({"machine": self.machine, "options": self.options, "speeds": speeds, "figures": self.figures, "problems": self.problems}, f, indent=1)

    @staticmethod
    def load(path):
        with open(path) as f:
            saved = json.load(f)
        results = Results(saved["machine"], saved["options"])
        for entry in saved["speeds"]:
            results.speeds[entry["group"], entry["row"]] = {"unit": entry["unit"], "samples": entry["samples"]}
        results.figures, results.problems = saved["figures"], saved["problems"]
        return results

    def groups(self):
        return list(dict.fromkeys([group for group, _ in self.speeds] + [figure["group"] for figure in self.figures]))

    def tables(self):
        """(title, head, rows) of each table."""
        for group in self.groups():
            rows = [row for g, row in self.speeds if g == group]
            if rows:
                sides = list(dict.fromkeys(side for row in rows for side in self.speeds[group, row]["samples"] if side != "bare"))
                sides += [BOTH] * ("floor" in sides)
                head = [group, "bare", *sides, "goal", "missed by"]
                yield group, head, [self._speed_row(group, row, sides) for row in rows]
            figures = [figure for figure in self.figures if figure["group"] == group]
            if figures:
                sides = list(dict.fromkeys(figure["side"] for figure in figures))
                names = list(dict.fromkeys((figure["row"], figure["unit"]) for figure in figures))
                yield group, [group, "unit", *sides, "goal", "missed by"], [self._figure_row(figures, name, unit, sides) for name, unit in names]
        compared = self.against_peers()
        if compared[-1]:
            yield compared

    def against_peers(self):
        """(title, head, rows) of a table of cowfs and the fastest FUSE peer in each row, relative to the bare directory, and in
        how many rounds cowfs was the faster of the two."""
        head, rows = ["against the FUSE peers", "cowfs", "fastest peer", "", "cowfs ahead by", "rounds ahead", ""], []
        for (group, row), entry in self.speeds.items():
            ratios = self.ratios(group, row)
            peers = [side for side in PEERS if side in ratios]
            if not peers or "cowfs" not in ratios:
                continue
            best = max(peers, key=ratios.get)
            pairs = list(zip(entry["samples"]["cowfs"], entry["samples"][best]))
            note = "the kernel alone answers" if row in ANSWERED_BY_THE_KERNEL else ""
            rows.append([row, "%.2f" % ratios["cowfs"], best, "%.2f" % ratios[best], "%+.0f %%" % (100 * (ratios["cowfs"] / ratios[best] - 1)),
                         "%d of %d" % (sum(ours > theirs for ours, theirs in pairs), len(pairs)), note])
        return "against the FUSE peers", head, rows

    def _speed_row(self, group, row, sides):
        ratios, goal, unit = self.ratios(group, row), RATIO_GOALS.get(row), self.speeds[group, row]["unit"]
        bare = statistics.median(self.speeds[group, row]["samples"].get("bare") or [0])
        cells = ["%.2f" % ratios[side] if side in ratios else "-" for side in sides]
        ours = [side for side in sides if side.startswith("cowfs") and side in ratios]
        missed = [side for side in ours if goal and round(ratios[side], 2) < goal]
        return [row, "%s %s" % (short(bare), unit), *cells, "≥ %.2f" % goal if goal else "", _verdict(missed, ours if goal else [])]

    @staticmethod
    def _figure_row(figures, name, unit, sides):
        here = {figure["side"]: figure for figure in figures if figure["row"] == name and figure["unit"] == unit}
        limits = sorted({figure["limit"] for figure in here.values() if figure["limit"] is not None})
        judged = [side for side, figure in here.items() if figure["limit"] is not None]
        missed = [side for side in judged if here[side]["value"] is None or here[side]["value"] > here[side]["limit"]]
        cells = [short(here[side]["value"]) if side in here else "-" for side in sides]
        return [name, unit, *cells, "≤ " + " or ".join(map(short, limits)) if limits else "", _verdict(missed, judged)]

    def text(self):
        parts = []
        for _, head, rows in self.tables():
            widths = [max(len(line[k]) for line in [head, *rows]) for k in range(len(head))]
            for line in [head, *rows]:
                parts.append("  ".join(cell.ljust(width) if k in (0, len(head) - 1) else cell.rjust(width) for k, (cell, width) in enumerate(zip(line, widths))).rstrip())
            parts.append("")
        return "\n".join(parts + ["problem: " + problem for problem in self.problems])

    def markdown(self):
        parts = []
        for title, head, rows in self.tables():
            parts.append("### " + title[0].upper() + title[1:] + "\n")
            parts += ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]]
            parts.append("")
        return "\n".join(parts)

    def compare(self, old):
        """Lines on what has changed since an earlier run: ratios, and figures."""
        lines = []
        for group, row in self.speeds:
            if (group, row) in old.speeds:
                before, now = old.ratios(group, row), self.ratios(group, row)
                lines += [self._change(group, row, side, before[side], now[side], True) for side in now if side in before and side != "bare"]
        known = {(f["group"], f["row"], f["side"]): f["value"] for f in old.figures}
        for f in self.figures:
            before = known.get((f["group"], f["row"], f["side"]))
            if before and f["value"]:
                lines.append(self._change(f["group"], f["row"], f["side"], before, f["value"], False))
        return "\n".join(lines)

    @staticmethod
    def _change(group, row, side, before, now, more_is_better):
        change = now / before - 1
        word = "" if abs(change) < 0.1 else "better" if (change > 0) == more_is_better else "worse"
        return "%-9s %-42s %-22s %9s -> %9s  %+4.0f %%  %s" % (group, row, side, short(before), short(now), 100 * change, word)
