//! Rejections of requests whose body the server has not read yet, over sockets.
//!
//! A rejection must reach a client that is still sending its request, also if the client reads only after it has sent
//! all of it. The server therefore responds first and then drains the body within bounds.
//!
//! A test whose client is not installed prints a line and passes. With `BUTTRESS_REQUIRE_REAL` set it fails.

mod bounds;
mod clients;
mod curl;
mod httpx;
mod raw;
mod results;
mod servers;

/// Size of an upload.
const UPLOAD: usize = 8 * 1024 * 1024;
