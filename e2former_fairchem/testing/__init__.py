"""Test classes to inherit: what every smooth, equivariant potential inside fairchem should satisfy.

Subclass a mixin, define ``build_model``, and pytest runs its tests on your model:

    class TestMyPotential(EquivarianceTests, PeriodicTests):
        def build_model(self):
            return MyHydraModel(...)

pytest is imported by the mixins and is not a dependency of the package itself.
"""

from e2former_fairchem.testing.data import atomic_data, random_molecule, random_rotation, water_box
from e2former_fairchem.testing.equivariance import EquivarianceTests
from e2former_fairchem.testing.gradients import GradientTests
from e2former_fairchem.testing.periodic import PeriodicTests
from e2former_fairchem.testing.smoothness import SmoothCutoffTests

__all__ = [
    "EquivarianceTests",
    "GradientTests",
    "PeriodicTests",
    "SmoothCutoffTests",
    "atomic_data",
    "random_molecule",
    "random_rotation",
    "water_box",
]
