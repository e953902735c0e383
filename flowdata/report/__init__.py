"""What a data set's losses look like: figures, pictures, pages."""

from flowdata.report.pictures import plot_losses
from flowdata.report.report import Report, write_report
from flowdata.report.samples import Piece
from flowdata.report.summary import summarize

__all__ = ["Piece", "Report", "plot_losses", "summarize", "write_report"]
