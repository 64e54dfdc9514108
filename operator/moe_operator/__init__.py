"""The MoEServing resource and what makes it real, on one machine or on Kubernetes."""
