"""The bundled sample data set, element references, and data sets held in memory."""
