"""A fast stand-in for a simulation: Gaussian processes from hidden values to errors of readings.

Errors are standardised: a simulation that agrees with what was seen has errors of size one. They are many
(every readout of every frame) but vary in few directions, so they are emulated on their principal components
(Higdon et al. 2008, Computer model calibration using high-dimensional output, section 2.2).
"""

from dataclasses import dataclass

import numpy as np

LENGTHS = (0.7, 1.0, 1.5, 2.5, 4.0, 8.0)
"""Correlation lengths that are tried, in standard deviations of the training points."""
NUGGETS = (1e-4, 1e-3, 1e-2, 0.1, 0.5, 2.0)
"""Shares of roughness that are tried: contacts answer a hair's breadth of friction by a jump."""
LEAST_SPREAD = 0.25
"""Principal components are kept until what is left out has less than this mean square in all."""
MOST_COMPONENTS = 8


@dataclass(frozen=True)
class _Process:
    """One component given one correlation length and nugget; P training points, B basis functions."""

    evidence: float
    length: float
    nugget: float
    scale: float
    lower_PP: np.ndarray
    basis_PB: np.ndarray
    """The linear mean's basis, whitened by the kernel's factor."""
    slope_B: np.ndarray
    rest_P: np.ndarray


class Emulator:
    """Gaussian processes with a linear mean (Rasmussen and Williams 2006, section 2.7), one a component.

    P training points of D dimensions and their R standardised errors. Length and nugget of each component
    maximise the evidence (eq. 2.45, with the mean integrated out) over a grid.
    """

    def __init__(self, points_PD: np.ndarray, errors_PR: np.ndarray) -> None:
        self._centre_D, self._spread_D = points_PD.mean(0), points_PD.std(0) + 1e-9
        self._points_PD = self._whiten(points_PD)
        mean_R = errors_PR.mean(0)
        _, values, rows = np.linalg.svd(errors_PR - mean_R, full_matrices=False)
        left = np.cumsum(np.square(values)[::-1])[::-1] / len(points_PD)
        count = int(np.clip((left > LEAST_SPREAD).sum(), 1, MOST_COMPONENTS))
        components_CR = rows[:count]
        self._mean_C = components_CR @ mean_R
        self._processes = _fit(self._points_PD, (errors_PR - mean_R) @ components_CR.T)

    def log_likelihood(self, points_ND: np.ndarray) -> np.ndarray:
        """Log of the expected likelihood [N] of no error, but for a constant.

        The emulator's variance v adds to that of the readings: log Normal(0; m, 1 + v) a component. Where
        nothing has been simulated it is flat rather than wrong.
        """
        points_ND = self._whiten(points_ND)
        basis_NB = np.c_[np.ones(len(points_ND)), points_ND]
        square_NP = np.square(points_ND[:, None] - self._points_PD).sum(-1)
        log_N = np.zeros(len(points_ND))
        for mean, process in zip(self._mean_C, self._processes, strict=True):
            kernel_PN = np.exp(-0.5 * square_NP.T / process.length**2)
            whitened_PN = np.linalg.solve(process.lower_PP, kernel_PN)
            mean_N = mean + basis_NB @ process.slope_B + process.rest_P @ whitened_PN
            open_NB = basis_NB - whitened_PN.T @ process.basis_PB
            inverse_BB = np.linalg.inv(process.basis_PB.T @ process.basis_PB)
            unknown_N = 1 + process.nugget - np.square(whitened_PN).sum(0)
            unknown_N += np.einsum("nb,bc,nc->n", open_NB, inverse_BB, open_NB)
            variance_N = 1 + process.scale * np.maximum(unknown_N, 0)
            log_N -= 0.5 * np.square(mean_N) / variance_N + 0.5 * np.log(variance_N)
        return log_N

    def _whiten(self, points_ND: np.ndarray) -> np.ndarray:
        return (points_ND - self._centre_D) / self._spread_D


def _fit(points_PD: np.ndarray, values_PC: np.ndarray) -> list[_Process]:
    """The process of the greatest evidence for each component."""
    basis_PB = np.c_[np.ones(len(points_PD)), points_PD]
    square_PP = np.square(points_PD[:, None] - points_PD).sum(-1)
    free = len(points_PD) - basis_PB.shape[1]
    best: list[_Process | None] = [None] * values_PC.shape[1]
    for length in LENGTHS:
        kernel_PP = np.exp(-0.5 * square_PP / length**2)
        for nugget in NUGGETS:
            lower_PP = np.linalg.cholesky(kernel_PP + (nugget + 1e-8) * np.eye(len(points_PD)))
            whitened = np.linalg.solve(lower_PP, np.c_[basis_PB, values_PC])
            white_PB, white_PC = np.split(whitened, [basis_PB.shape[1]], axis=1)
            slope_BC = np.linalg.lstsq(white_PB, white_PC, rcond=None)[0]
            rest_PC = white_PC - white_PB @ slope_BC
            scale_C = np.square(rest_PC).sum(0) / free + 1e-6
            shape = np.log(np.diag(lower_PP)).sum() + 0.5 * np.linalg.slogdet(white_PB.T @ white_PB)[1]
            evidence_C = -0.5 * free * np.log(scale_C) - shape
            for index, (evidence, held) in enumerate(zip(evidence_C, best, strict=True)):
                if held is None or evidence > held.evidence:
                    parts = slope_BC[:, index], rest_PC[:, index]
                    scale = float(scale_C[index])
                    best[index] = _Process(evidence, length, nugget, scale, lower_PP, white_PB, *parts)
    return [process for process in best if process is not None]
