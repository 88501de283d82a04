package main

import (
	"time"

	"github.com/spf13/pflag"

	"tercet.dev/tercet/server"
)

// contactOptions are the flags of the contact-form template's routes, on nodes and gateways alike.
type contactOptions struct {
	stream, group string
	timeout       time.Duration
}

func (o *contactOptions) register(f *pflag.FlagSet) {
	f.StringVar(&o.stream, "contact-stream", "contact-messages", "`stream` behind /api/messages/…, the contact-form template's routes")
	f.StringVar(&o.group, "contact-group", "contact-processors", "consumer `group` of that stream")
	f.DurationVar(&o.timeout, "contact-timeout", time.Minute, "how long a consumer may hold a message of that stream")
}

func (o *contactOptions) options() server.ContactOptions {
	return server.ContactOptions{Stream: o.stream, Group: o.group, Timeout: o.timeout}
}
