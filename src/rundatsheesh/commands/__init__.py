"""The verbs of `rds`: host.py for whoever runs a server, vm.py for whoever uses one."""
