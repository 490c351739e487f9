from hypothesis import HealthCheck, settings

# Nothing here may depend on how busy the machine is: examples have no deadline, and drawing them may be slow.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
