//! Servers that drain while curl, grpcio and raw clients call them.

mod restarts;
