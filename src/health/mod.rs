//! Health: probes of what is called, and endpoints that tell how this process is.

mod answer;
mod endpoints;
mod gate;
mod handle;
mod layer;
mod probe;
mod prober;
mod registry;
mod threshold;

pub use self::{
    endpoints::{
        HealthBody, HealthEndpoints, HealthEndpointsFuture, HealthEndpointsLayer, HealthService,
    },
    handle::{HealthProbeHandle, HealthProbeSnapshot, LastProbe},
    layer::{HealthProbe, HealthProbeLayer},
    probe::{AnyAnswer, Ask, Get, Judged, Probe, ProbeFailure, SendRequest},
    registry::{CheckState, Health, Reporter},
    threshold::ProbeState,
};
pub use crate::admission::ResponseFuture;
