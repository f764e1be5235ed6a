"""The result of a run, as `train` returns it: the model, its metrics, and their history as a table and as curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nesso_tune.errors import RecipeError, closest
from nesso_tune.metric_registry import METRICS
from nesso_tune.runs.layout import METRICS as METRICS_FILE
from nesso_tune.runs.layout import REPORT
from nesso_tune.runs.metrics_log import read_metrics

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure

    from nesso_tune.training.fit import Trainer

SHOWN = ("loss", "eval_loss", "eval_rewards/accuracies", "stop_rate", "language_fidelity")  # in a notebook
PLOTTED = ("loss", "eval_loss")  # by default


@dataclass(frozen=True, repr=False)
class TrainResult:
    """Result of a run.

    Attributes:
        model_dir: the finished model, `final/`.
        metrics: the last value of every metric; if `train.best_metric` selected earlier weights, up to their step.
        notes: messages from opening the run directory.
        trained: False if the run was already finished.
        asked_to_stop: a signal arrived too late to stop this run; do not start another one.
        trainer: the trainer, a subclass of TRL's SFTTrainer or DPOTrainer with the trained model (`trainer.model`);
            None if the run was already finished. It holds the memory of model and optimizer.
    """

    model_dir: Path
    metrics: dict[str, Any]
    notes: tuple[str, ...] = ()
    trained: bool = True
    asked_to_stop: bool = False
    trainer: Trainer | None = field(default=None, compare=False)

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.model_dir.parent

    @property
    def report(self) -> Path:
        """The report of the run, an HTML page that opens offline."""
        return self.run_dir / REPORT

    @property
    def history(self) -> pandas.DataFrame:
        """All metrics over the run: one row per step, indexed by `step`, and one column per metric (`eval_loss/it`)."""
        import pandas

        rows: dict[int, dict[str, Any]] = {}
        for line in read_metrics(self.run_dir / METRICS_FILE):
            if "event" not in line:
                values = {name: float(value) for name, value in line.items() if name != "step"}
                rows.setdefault(line["step"], {}).update(values)
        frame = pandas.DataFrame.from_dict(rows, orient="index")
        frame.index.name = "step"
        return frame

    def plot(self, *metrics: str) -> Figure:
        """Curves of metrics over the steps, as a Plotly figure with one chart per metric.

        Args:
            metrics: names of metrics, by default `loss` and `eval_loss`. A name without a language or source, such as
                `eval_loss`, also shows the metric by language.

        Raises:
            RecipeError: for a metric that the run did not measure.
        """
        from plotly.subplots import make_subplots

        history = self.history
        names = metrics or [name for name in PLOTTED if name in history]
        columns = {name: _columns(name, list(history)) for name in names}
        figure = make_subplots(rows=max(1, len(names)), cols=1, shared_xaxes=True, subplot_titles=names,
                               figure=_notebook_figure())  # fmt: skip
        for row, (name, keys) in enumerate(columns.items(), 1):
            for key in keys:
                values = history[key].dropna()
                figure.add_scatter(x=values.index, y=values, name=key, mode="lines+markers", row=row, col=1)
            figure.update_yaxes(title_text=name, row=row, col=1)
        figure.update_xaxes(title_text="step", row=max(1, len(names)), col=1)
        figure.update_layout(height=max(320, 260 * len(names)), hovermode="x unified")
        return figure

    @property
    def main_metrics(self) -> dict[str, float]:
        """The metrics that summarise a run, those of `SHOWN` that it measured."""
        return {name: self.metrics[name] for name in SHOWN if isinstance(self.metrics.get(name), (int, float))}

    def __repr__(self) -> str:
        shown = "" if self.trained else ", was finished before"
        shown += "".join(f", {name} {value:.4g}" for name, value in self.main_metrics.items())
        return f"TrainResult({str(self.model_dir)!r}, step {self.metrics.get('step', 0):,}{shown})"

    def _repr_html_(self) -> str:
        """A plain table without styles, so that a notebook keeps its look."""
        facts = {"model": self.model_dir, "report": self.report, "step": f"{self.metrics.get('step', 0):,}"}
        facts |= {} if self.trained else {"trained": "no: the run was finished before (overwrite=True trains it again)"}
        facts |= {name: f"{value:.4g}" for name, value in self.main_metrics.items()}
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(text))}</td></tr>" for name, text in facts.items())
        return f"<table>{rows}</table>"


def _notebook_figure() -> Figure:
    """A figure that a notebook shows without a network, also if its kernel has no nbformat, which Plotly needs."""
    from plotly.graph_objects import Figure

    class NotebookFigure(Figure):
        def _ipython_display_(self) -> None:
            try:
                super()._ipython_display_()
            except ValueError:  # no nbformat; Plotly's next choice would load its code from the network
                from IPython.display import HTML, display

                display(HTML(self.to_html(full_html=False, include_plotlyjs=True)))

    return NotebookFigure()


def _columns(name: str, measured: list[str]) -> list[str]:
    """The columns of a metric: over all rows, and by language."""

    def is_by_language(key: str) -> bool:
        return key.startswith(f"{name}/") and "/" not in key.removeprefix(f"{name}/") and key not in METRICS

    found = [key for key in measured if key == name or is_by_language(key)]
    if not found:
        near = closest(name, measured)
        remedy = f"did you mean `{near}`?" if near else f"use one of {', '.join(measured)}"
        raise RecipeError("plot", f"the run did not measure `{name}`", remedy)
    return found
