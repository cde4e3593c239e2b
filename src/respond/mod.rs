//! The conversion of a rejection into an error or a response.
//!
//! A layer that rejects calls has a strategy: [`AsError`] (the default), [`Respond`] or [`RespondWith`].
//! [`RespondLayer`] converts the rejections that a whole stack returns as errors.

mod layer;
mod reject;

pub use self::layer::{RespondFuture, RespondLayer, RespondService};
pub use self::reject::{AsError, Reject, Respond, RespondWith, ResponseFormat};
pub(crate) use self::reject::{accepts, whole_seconds};
