//! The machine around a disk: image formats, backing chains, and the definition of a VM.
//!
//! Nothing here changes an image or a VM. What if we are killed here? Nothing is left behind but,
//! for a moment, a `virsh` that ends by itself. What if the other side is older or absent?
//! Without libvirt a VM is described by a `machine.toml` made from what is known.

pub mod chain;
pub mod definition;
pub mod image;

pub use chain::{BackingName, ChainLink};
pub use definition::{Definition, Domain, Virsh};
pub use image::{ImageFormat, ImageInfo};
