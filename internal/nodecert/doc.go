// Package nodecert gives the nodes of a cluster their certificates: an authority of the cluster's own, one-time tokens
// with which a node obtains its first certificate, and the renewal of the ones in use. See DESIGN.md.
package nodecert
