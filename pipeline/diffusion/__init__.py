"""The mathematics: schedule, objective, posterior, guidance, draws and samplers."""
