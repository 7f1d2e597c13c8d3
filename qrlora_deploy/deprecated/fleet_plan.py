"""`qrlora_deploy.training.fleet.plan` as it was: today's classes and function, some under their former names."""

from qrlora_deploy.training.fleet.customers import Customer, FleetSource, Shard
from qrlora_deploy.training.fleet.customers import FleetCustomers as Plan
from qrlora_deploy.training.fleet.customers import choose_customers as plan_fleet

__all__ = ["Customer", "FleetSource", "Plan", "Shard", "plan_fleet"]
