//! TODO page

mod body;
mod buffer;

pub use self::body::ReplayBody;
pub(crate) use self::body::Tape;
