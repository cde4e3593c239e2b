use std::time::Duration;

use tower_layer::Layer;

use super::{core::Circuit, handle::CircuitBreakerHandle, state::Settings, trip::Trip};
use crate::{
    ConfigError,
    admission::{Plan, admission_layer},
    call::{AsError, Http, Shared},
};

const DEFAULTS: Settings =
    Settings { open_for: Duration::from_secs(30), probes: 1, lease: Duration::from_secs(30) };

/// More probes than this are no probes any more.
const MOST_PROBES: u16 = 1000;

admission_layer! {
    /// Stops calling what keeps failing, and asks carefully when it is back.
    ///
    /// One circuit belongs to one layer and all its clones, however often the layer is applied. See the
    /// [module](crate::breaker).
    layer CircuitBreakerLayer {}
    /// The service of a [`CircuitBreakerLayer`].
    service CircuitBreaker
    policy Shared<Circuit>
}

impl CircuitBreakerLayer {
    /// Five failures in a row, open for 30 s, one probe; HTTP and gRPC.
    pub fn http() -> Self {
        Self::new(Trip::default())
    }

    /// Opens by this rule. HTTP and gRPC are recognised; for other types say what failed with
    /// [`classify`](Self::classify).
    pub fn new(trip: Trip) -> Self {
        let checked = trip.check();
        let trip = if checked.is_ok() { trip } else { Trip::default() };
        let policy = Shared::new(Circuit::new(&trip, DEFAULTS));
        Self { plan: Plan { policy, protocol: Http, reject: AsError, fault: checked.err() } }
    }
}

impl<M, R> CircuitBreakerLayer<M, R> {
    /// How long an open circuit refuses before it lets probes through: 30 s by default, above zero.
    pub fn open_for(mut self, wait: Duration) -> Self {
        if let Some(wait) = self.plan.accept(above_zero("open_for", wait)) {
            self.plan.policy.configure(|settings| settings.open_for = wait);
        }
        self
    }

    /// How many probes go through a half-open circuit, at most at once and all in all: 1 by default, up
    /// to 1000. All must succeed to close it; the first that fails opens it again.
    pub fn half_open(mut self, probes: u16) -> Self {
        let checked = match probes {
            1..=MOST_PROBES => Ok(probes),
            _ => Err(ConfigError::new("half_open", probes, "use 1 to 1000 probes")),
        };
        if let Some(probes) = self.plan.accept(checked) {
            self.plan.policy.configure(|settings| settings.probes = probes);
        }
        self
    }

    /// The longest that a probe may take: 30 s by default, above zero. One that has seen a good head by
    /// then counts as passed, any other as failed: a stream for hours cannot keep a circuit half-open.
    pub fn probe_lease(mut self, longest: Duration) -> Self {
        if let Some(longest) = self.plan.accept(above_zero("probe_lease", longest)) {
            self.plan.policy.configure(|settings| settings.lease = longest);
        }
        self
    }

    /// A name for refusals, events and snapshots. The first one given stays.
    pub fn name(self, name: &str) -> Self {
        self.plan.policy.name(name);
        self
    }

    /// Looks at the circuit and steers it.
    #[must_use]
    pub fn handle(&self) -> CircuitBreakerHandle {
        CircuitBreakerHandle(self.plan.policy.clone())
    }
}

fn above_zero(field: &'static str, value: Duration) -> Result<Duration, ConfigError> {
    if value.is_zero() {
        return Err(ConfigError::new(field, value, "use a time above zero"));
    }
    Ok(value)
}

impl<S, M: Clone, R: Clone> Layer<S> for CircuitBreakerLayer<M, R> {
    type Service = CircuitBreaker<S, M, R>;

    fn layer(&self, inner: S) -> Self::Service {
        CircuitBreaker { admission: self.plan.service(inner) }
    }
}
