package server

import (
	"context"
	"encoding/json"
	"net/http"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/wire"
)

// ContactStore keeps the messages of the contact-form template's three routes. A cluster node and the gateway each
// have one. Errors are *errs.Error. It is used concurrently.
type ContactStore interface {
	// Produce appends a message and returns its stream ID.
	Produce(ctx context.Context, m ContactMessage) (id string, err error)
	// Consume returns the message that the consumer has not acknowledged yet, else the next one that nobody holds, else
	// nil. Asked again it returns the same one, until it is acknowledged or was held for too long.
	Consume(ctx context.Context, consumer string) (*ContactDelivery, error)
	// Acknowledge ends a message and returns 1, or 0 when no such message was held.
	Acknowledge(ctx context.Context, id string) (int, error)
	// Topic is where the messages are, for the check of rights.
	Topic() string
}

// ContactMessage is what the template's form sends. Timestamp is set by the route, as ISO 8601.
type ContactMessage struct {
	Name      string `json:"name"`
	Email     string `json:"email"`
	Message   string `json:"message"`
	Timestamp string `json:"timestamp"`
}

// ContactDelivery is a message given to a reviewer.
type ContactDelivery struct {
	ID string `json:"messageId"`
	ContactMessage
	// DeliveryCount is how often the message was given out, this time included.
	DeliveryCount int64 `json:"deliveryCount"`
}

const (
	contactPrefix = "/api/messages/"
	// contactBodyMax bounds the form's body.
	contactBodyMax = 64 << 10
	// contactConsumer is who consumes when the request names nobody.
	contactConsumer = "default"
)

// routeContact routes below /api/messages/.
func (x *exchange) routeContact(name string) (handler, Access, *errs.Error) {
	x.topic = x.s.contact.Topic()
	switch name {
	case "produce":
		return x.methods(opSend, Publish, http.MethodPost, (*exchange).contactProduce)
	case "consume":
		return x.methods(opReceive, Receive, http.MethodGet, (*exchange).contactConsume)
	case "acknowledge":
		return x.methods(opAcknowledge, Receive, http.MethodPost, (*exchange).contactAcknowledge)
	}
	x.op = opOther
	return nil, 0, errs.Of(errs.NotFound)
}

// readContact reads the body as a JSON object. Members it does not know are passed over, as the template does; the
// content type is not looked at, since curl's default is a form's.
func (x *exchange) readContact(document any) *errs.Error {
	buf := getBuffer(0)
	defer putBuffer(buf)
	var e *errs.Error
	if buf.b, e = x.readBody(buf.b, contactBodyMax); e != nil {
		return e
	}
	if err := json.Unmarshal(buf.b, document); err != nil {
		return errs.New(errs.InvalidBody, "the body is not a JSON object with strings: %v", err)
	}
	return nil
}

func (x *exchange) answerContact(status int, document any) {
	b, err := json.Marshal(document)
	if err != nil {
		x.fail(errs.New(errs.Internal, "%v", err))
		return
	}
	h := x.w.Header()
	h["Content-Type"] = jsonType
	h["Cache-Control"] = noStore
	h[wire.HeaderRequestID] = []string{x.requestID()}
	x.w.WriteHeader(status)
	x.w.Write(b)
}

func (x *exchange) contactProduce() {
	var m ContactMessage
	if e := x.readContact(&m); e != nil {
		x.fail(e)
		return
	}
	for _, f := range []struct{ name, value string }{{"name", m.Name}, {"email", m.Email}, {"message", m.Message}} {
		if f.value == "" {
			x.fail(errs.New(errs.InvalidBody, "%s is required", f.name))
			return
		}
	}
	m.Timestamp = time.Now().UTC().Format("2006-01-02T15:04:05.000Z")
	if e := x.holdSlot(); e != nil {
		x.fail(e)
		return
	}
	ctx, cancel := x.commandContext()
	defer cancel()
	id, err := x.s.contact.Produce(ctx, m)
	if err != nil {
		x.fail(errs.From(err))
		return
	}
	x.answerContact(http.StatusCreated, struct {
		ID        string `json:"messageId"`
		Timestamp string `json:"timestamp"`
	}{id, m.Timestamp})
}

func (x *exchange) contactConsume() {
	consumer := x.r.URL.Query().Get("consumer")
	if consumer == "" {
		consumer = contactConsumer
	}
	if !validName(consumer) {
		x.fail(errs.New(errs.InvalidName, "consumer is not valid"))
		return
	}
	if e := x.holdSlot(); e != nil {
		x.fail(e)
		return
	}
	ctx, cancel := x.commandContext()
	defer cancel()
	d, err := x.s.contact.Consume(ctx, consumer)
	if err != nil {
		x.fail(errs.From(err))
		return
	}
	x.answerContact(http.StatusOK, struct {
		Message *ContactDelivery `json:"message"`
	}{d})
}

func (x *exchange) contactAcknowledge() {
	var m struct {
		ID string `json:"messageId"`
	}
	if e := x.readContact(&m); e != nil {
		x.fail(e)
		return
	}
	if m.ID == "" {
		x.fail(errs.New(errs.InvalidBody, "messageId is required"))
		return
	}
	if e := x.holdSlot(); e != nil {
		x.fail(e)
		return
	}
	ctx, cancel := x.commandContext()
	defer cancel()
	n, err := x.s.contact.Acknowledge(ctx, m.ID)
	if err != nil {
		x.fail(errs.From(err))
		return
	}
	x.answerContact(http.StatusOK, struct {
		Success      bool `json:"success"`
		Acknowledged int  `json:"acknowledged"`
	}{true, n})
}
