"""What training needs beyond fairchem: losses, schedules, samplers, callbacks, checkpoints and config resolvers."""
