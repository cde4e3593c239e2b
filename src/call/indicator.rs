use std::fmt;

/// Says at once, and without asking anybody, whether something is well: what a breaker's, a limit's or a health
/// probe's handle is to a [`Health`](crate::Health) registry, and a closure of yours.
///
/// It is asked in the background and must not block.
pub trait Indicator: Send + 'static {
    /// Well, or why not.
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
