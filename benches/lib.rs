//! What the measuring programs share: a load client, a server to be called, and a look at a process's cost.
//!
//! Nothing here is part of the product, and the product is used by its public entry points only. Loads are bounded in
//! connections, time and bytes, and speak to the one address they are given.

pub mod load;
pub mod process;
pub mod serve;
