/// The supertrait of the traits that only this crate implements. No other crate can name it.
pub trait Sealed {}
