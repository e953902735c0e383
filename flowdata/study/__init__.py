"""Methods × rates × seeds on a model of yours: runs, table, picture."""
