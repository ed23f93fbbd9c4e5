//! Traits between edges: who asks, who answers.
//!
//! | port | asked by | answered by |
//! | --- | --- | --- |
//! | [`tracking`] | `filter/` (the write path) | `tracker/` |
//! | [`names`] | `filter/` (renames, removals, new files) | `host/` |
//! | [`source`] | `ship/` (cut, read, acknowledge) | `tracker/` |
//! | [`vault`] | `ship/` (head, parts, commit) | `vault/` |
//! | [`points`] | `view/`, restore, the command line | `vault/` |

pub mod names;
pub mod points;
pub mod source;
pub mod tracking;
pub mod vault;
