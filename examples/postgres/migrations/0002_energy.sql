-- Joules that the board drew while the answer was made, where it has a sensor.
alter table answers add column energy_j double precision;
