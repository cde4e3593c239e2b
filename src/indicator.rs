use std::fmt;

/// Reports the health of a component to a [`Health`](crate::health::Health) registry, without a request.
///
/// The handles of circuit breakers, limits and health probes implement it, and so do closures that return a
/// `Result<(), E>`. The registry calls it in the background, so it must not block.
pub trait Indicator: Send + 'static {
    /// Returns `Ok` if the component is healthy, and otherwise the reason why it is not.
    fn indicate(&self) -> Result<(), String>;
}

impl<F, E> Indicator for F
where
    F: Fn() -> Result<(), E> + Send + 'static,
    E: fmt::Display,
{
    fn indicate(&self) -> Result<(), String> {
        self().map_err(|why| why.to_string())
    }
}
