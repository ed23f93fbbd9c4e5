//! The views on real mounts: points, clones, restore. The store is a fake in memory; kernel,
//! file systems, loop devices and qemu-img are real.

mod clone;
mod fake;
mod points;
mod restore;
