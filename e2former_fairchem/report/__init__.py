"""Reports on trained and evaluated potentials: errors in numbers and figures, and one page with all of it.

Data goes one way: `collect` (predictions of an evaluation) -> `errors` (sums, histograms and samples of bounded size)
-> `folder` (numbers on disk) -> `figures`, `curves`, `tables` -> `page`. Everything after the numbers can be made again
from the folder: `e2former-fairchem report FOLDER`.
"""
