/// One `tracing` event per decision; nothing at all without the feature.
#[cfg(feature = "tracing")]
macro_rules! event {
    ($level:ident, $($what:tt)*) => { ::tracing::event!(::tracing::Level::$level, $($what)*) };
}
#[cfg(not(feature = "tracing"))]
macro_rules! event {
    ($($what:tt)*) => {{}};
}
pub(crate) use event;
