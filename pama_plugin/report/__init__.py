"""From a run's TensorBoard folder to a table and a picture."""

from pama_plugin.report.summary import report_run

__all__ = ["report_run"]
